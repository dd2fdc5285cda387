// SFT (S) -> RL (S+C)
(import 'base.libsonnet') + (import 'models/s.libsonnet') + (import 'data/both.libsonnet')
