// SFT on simple edits, then on both. No model of it is published: the pipeline makes one, or model_path names your own.
// sft.sc2stage.base_model=<folder> starts the second stage from a finished first one.
local mixing = import '../data/mixing.libsonnet';
{
  model_path: 'stage:sft/sc2stage',
  sft: {
    s: $.fine_tuning(mixing.simple),
    sc2stage: $.fine_tuning(mixing.both) + { base_model: 'stage:sft/s' },
  },
}
