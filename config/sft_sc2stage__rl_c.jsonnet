// SFT (S, then S+C) -> RL (C)
(import 'base.libsonnet') + (import 'models/sc2stage.libsonnet') + (import 'data/complex.libsonnet')
