// SFT on simple and complex edits. No model of it is published: the pipeline makes one, or model_path names your own.
local mixing = import '../data/mixing.libsonnet';
{
  model_path: 'stage:sft/sc',
  sft: { sc: $.fine_tuning(mixing.both) },
}
