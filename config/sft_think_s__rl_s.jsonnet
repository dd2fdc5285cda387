// SFT with reasoning (S) -> RL (S)
(import 'base.libsonnet') + (import 'models/think_s.libsonnet') + (import 'data/simple.libsonnet')
