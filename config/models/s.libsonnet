// SFT on simple edits.
(import '../base.libsonnet') + {
  model_path: 'mair-lab/sft-simple',
}
