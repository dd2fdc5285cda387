// SFT on simple and complex edits: the model that the reference's files name, or with make_sft_models one that the
// pipeline makes. Whether the hub lets everyone download it is not known.
local mixing = import '../data/mixing.libsonnet';
{
  model_path:
    if $.make_sft_models then 'stage:sft/sc'
    else 'Image-editing/Emu3-Base-SFT-without_cot-May06_mixed_gc_lr1e-4-checkpoint-4800',
  sft: { sc: $.fine_tuning(mixing.both, 4800) },
}
