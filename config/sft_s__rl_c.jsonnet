// SFT (S) -> RL (C)
(import 'models/s.libsonnet') + (import 'data/complex.libsonnet')
