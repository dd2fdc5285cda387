// SFT on simple edits, then on both: the published model, or with make_sft_models one that the pipeline makes.
// sft.sc2stage.base_model=<folder> starts the second stage from a finished first one.
local mixing = import '../data/mixing.libsonnet';
{
  model_path:
    if $.make_sft_models then 'stage:sft/sc2stage'
    else 'Image-editing/Emu3-Base-SFT-without_cot-May07_mixed_gc_post_lr1e-4-checkpoint-1200',
  sft: {
    s: $.fine_tuning(mixing.simple, 11600),
    sc2stage: $.fine_tuning(mixing.both, 1200) + { base_model: 'stage:sft/s' },
  },
}
