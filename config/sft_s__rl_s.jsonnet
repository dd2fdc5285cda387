// SFT (S) -> RL (S)
(import 'base.libsonnet') + (import 'models/s.libsonnet') + (import 'data/simple.libsonnet')
