// SFT (S+C) -> RL (S+C)
(import 'base.libsonnet') + (import 'models/sc.libsonnet') + (import 'data/both.libsonnet')
