// SFT (S) -> RL (C)
(import 'base.libsonnet') + (import 'models/s.libsonnet') + (import 'data/complex.libsonnet')
