// SFT on simple edits: the published model, or with make_sft_models one that the pipeline makes.
local mixing = import '../data/mixing.libsonnet';
{
  model_path: if $.make_sft_models then 'stage:sft/s' else 'mair-lab/sft-simple',
  sft: { s: $.fine_tuning(mixing.simple) },
}
