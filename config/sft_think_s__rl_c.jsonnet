// SFT with reasoning (S) -> RL (C)
(import 'base.libsonnet') + (import 'models/think_s.libsonnet') + (import 'data/complex.libsonnet')
