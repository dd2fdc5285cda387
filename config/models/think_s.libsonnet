// SFT with reasoning on simple edits: every completion is made to think first.
(import '../base.libsonnet') + {
  model_path: 'mair-lab/thinking-sft-simple',
  assistant_prefill: " Let's think step by step. <|start thinking|>",
}
