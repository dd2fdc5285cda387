// SFT on simple edits, then on both. No checkpoint of it is published: APP__SFT_SC2STAGE_PATH names your own.
(import '../base.libsonnet') + {
  model_path: std.extVar('APP__SFT_SC2STAGE_PATH'),
}
