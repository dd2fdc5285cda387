// SFT on simple edits: the published model, or with make_sft_models one that the pipeline makes. The reference's files of
// June 2025 call it Image-Editing/Emu3-Base-SFT-without_cot-Mar04_256_lr1e-4-checkpoint-11600.
local mixing = import '../data/mixing.libsonnet';
{
  model_path: if $.make_sft_models then 'stage:sft/s' else 'mair-lab/sft-simple',
  sft: { s: $.fine_tuning(mixing.simple, 11600) },
}
