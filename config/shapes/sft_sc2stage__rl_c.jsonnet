(import 'world.libsonnet') + (import '../models/sc2stage.libsonnet') + (import '../data/complex.libsonnet') + {
  run_name: 'shapes_sft_sc2stage__rl_c',
}
