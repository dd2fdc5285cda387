// SFT (S+C) -> RL (C)
(import 'base.libsonnet') + (import 'models/sc.libsonnet') + (import 'data/complex.libsonnet')
