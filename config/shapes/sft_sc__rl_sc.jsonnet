(import 'world.libsonnet') + (import '../models/sc.libsonnet') + (import '../data/both.libsonnet') + {
  run_name: 'shapes_sft_sc__rl_sc',
}
