// SFT with reasoning (S) -> RL (C)
(import 'models/think_s.libsonnet') + (import 'data/complex.libsonnet')
