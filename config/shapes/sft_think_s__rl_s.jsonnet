(import 'world.libsonnet') + (import '../models/think_s.libsonnet') + (import '../data/simple.libsonnet') + {
  run_name: 'shapes_sft_think_s__rl_s',
}
