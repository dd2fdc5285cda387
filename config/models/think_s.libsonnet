// SFT with reasoning on simple edits: the published model, or with make_sft_models one that the pipeline makes. Every
// completion is made to think first. How many steps the published one took is not known: these are those of s.
local mixing = import '../data/mixing.libsonnet';
{
  model_path: if $.make_sft_models then 'stage:sft/think_s' else 'mair-lab/thinking-sft-simple',
  assistant_prefill: " Let's think step by step. <|start thinking|>",
  sft: { think_s: $.fine_tuning(mixing.simple, 11600) + { reasoning: true } },
}
