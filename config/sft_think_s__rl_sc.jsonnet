// SFT with reasoning (S) -> RL (S+C)
(import 'base.libsonnet') + (import 'models/think_s.libsonnet') + (import 'data/both.libsonnet')
