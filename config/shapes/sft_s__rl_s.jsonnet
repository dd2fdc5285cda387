(import 'world.libsonnet') + (import '../models/s.libsonnet') + (import '../data/simple.libsonnet') + {
  run_name: 'shapes_sft_s__rl_s',
}
