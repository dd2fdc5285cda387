// SFT (S) -> RL (S)
(import 'models/s.libsonnet') + (import 'data/simple.libsonnet')
