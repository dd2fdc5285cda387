// SFT with reasoning (S) -> RL (S+C)
(import 'models/think_s.libsonnet') + (import 'data/both.libsonnet')
