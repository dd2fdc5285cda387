// SFT (S) -> RL (S+C)
(import 'models/s.libsonnet') + (import 'data/both.libsonnet')
