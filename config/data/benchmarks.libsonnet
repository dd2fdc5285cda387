// Where the prompts of benchmarks stand: by name, the data sets of each (benchmarked.libsonnet tokenises them). The first
// six are those of the published table, with the rows that the paper's evaluation code takes.
//
// EmuEdit, AURORA-Bench, I2EBench, GEdit-Bench and ImgEdit-Bench have no edited image: they can be prompted with and
// judged without the truth, so not by the ground score. Names of files, columns and splits come from the cards and from
// that code; the files themselves were not at hand. `files` are those of a folder of your own, see benchmarks_dir.
local prompts(path, files, original, edited, instruction, task) = {
  source: 'parquet',
  [if path != null then 'path']: 'hf://datasets/' + path,
  files:: files,
  columns: {
    example_id: null,
    original: original,
    edited: edited,
    instruction: instruction,
    task: task,
    reasoning: null,
  },
};
local gedit(language) = prompts(
  'stepfun-ai/GEdit-Bench/*.parquet', 'gedit', 'input_image_raw', null, 'instruction', 'task_type'
) + { filter: { instruction_language: language }, columns+: { example_id: 'key' } };
// The code shuffles with this seed and takes the first thousand.
local thousand = { subset: { seed: 42, rows: 1000 } };
{
  // 700 rows.
  omniedit: { omniedit: prompts(
    'TIGER-Lab/OmniEdit-Filtered-1.2M/data/dev-*.parquet', 'omniedit', 'src_img', 'edited_img', 'edited_prompt_list[0]', 'task'
  ) },
  // 1,000 of 3,589 rows.
  emuedit: { emuedit: prompts(
    'facebook/emu_edit_test_set/data/test-*.parquet', 'emuedit', 'image', null, 'instruction', 'task'
  ) + thousand },
  // 400 rows.
  aurora: { aurora: prompts('McGill-NLP/aurora-bench/*test*.parquet', 'aurora', 'input', null, 'instruction', 'source') },
  magicbrush: { magicbrush: prompts(
    'sikarwarank/magicbrush_eval/magicbrush-test-00000.parquet', 'magicbrush', 'input', 'output', 'instruction', null
  ) },
  // Two files without a column for the task, which is in their names; instructions begin with a prefix.
  vismin: {
    ['vismin_' + task]: prompts(
      'mair-lab/escher-vismin-dev/data/train/%s-00001.parquet' % task,
      'vismin/*%s*.parquet' % task,
      'source_image', 'edited_image', 'edit_instruction', null,
    ) + { task_name: task, instruction_prefix: 'edit_instruction: ' }
    for task in ['counting', 'relation']
  },
  // 1,000 rows.
  i2ebench: { i2ebench: prompts(
    'sikarwarank/i2bench_eval/i2ebench-dataset.parquet', 'i2ebench', 'image', null, 'instruction', 'task'
  ) + thousand },

  // GEdit-Bench: 606 prompts in each of two languages, 11 types of edit (task_type). Its example code gives models
  // input_image_raw. It is judged by VIEScore, too, and reported by type. Not known here: the names of its Parquet files,
  // so all are taken; its own scoring code, which others say takes the mean over types, where ours is over prompts.
  gedit_en: { gedit_en: gedit('en') },
  gedit_cn: { gedit_cn: gedit('cn') },

  // ImgEdit-Bench, its basic part: 737 prompts of 9 types. It is a tar archive of JSON and pictures: `earl data fetch
  // imgedit --to <folder>` makes a Parquet file of it, and benchmarks_dir names the folder. Its own measure is another
  // one: GPT-4o gives three scores of 1 to 5 by a rubric of the type; a prompt's is their mean, a type's the mean of its
  // prompts. Not here: its parts `hard` (UGE) and `multiturn`.
  imgedit: { imgedit: prompts(null, 'imgedit', 'image', null, 'prompt', 'edit_type') + { columns+: { example_id: 'key' } } },
}
