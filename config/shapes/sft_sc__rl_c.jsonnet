(import 'world.libsonnet') + (import '../models/sc.libsonnet') + (import '../data/complex.libsonnet') + {
  run_name: 'shapes_sft_sc__rl_c',
}
