// SFT on simple and complex edits. No checkpoint of it is published: APP__SFT_SC_PATH names your own.
(import '../base.libsonnet') + {
  model_path: std.extVar('APP__SFT_SC_PATH'),
}
