// SFT with reasoning (S) -> RL (S)
(import 'models/think_s.libsonnet') + (import 'data/simple.libsonnet')
