(import 'world.libsonnet') + (import '../models/s.libsonnet') + (import '../data/both.libsonnet') + {
  run_name: 'shapes_sft_s__rl_sc',
}
