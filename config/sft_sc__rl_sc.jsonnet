// SFT (S+C) -> RL (S+C)
(import 'models/sc.libsonnet') + (import 'data/both.libsonnet')
