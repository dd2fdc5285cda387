// SFT (S+C) -> RL (C)
(import 'models/sc.libsonnet') + (import 'data/complex.libsonnet')
