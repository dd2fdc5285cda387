// SFT (S, then S+C) -> RL (S+C)
(import 'base.libsonnet') + (import 'models/sc2stage.libsonnet') + (import 'data/both.libsonnet')
