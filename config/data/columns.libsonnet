// Where the columns of the published data sets stand, for an entry of raw_datasets:
//
//   raw_datasets: { omniedit: (import 'data/columns.libsonnet').omniedit { path: '/data/OmniEdit/data/train-*.parquet' } }
//
// Column names are those that public code and documentation use; none was compared with the files themselves, and
// AURORA's subsets and VisMin's training pairs are guesses, marked below. A name that a file does not have stops
// tokenising before anything loads, and says which ones there are.
{
  // TIGER-Lab/OmniEdit-Filtered-1.2M; edited_prompt_list holds the same instruction in several wordings. Images alone
  // would take hundreds of gigabytes.
  omniedit: {
    source: 'parquet',
    columns: {
      example_id: 'omni_edit_id',
      task: 'task',
      instruction: 'edited_prompt_list[0]',
      original: 'src_img',
      edited: 'edited_img',
    },
    keep_images: false,
  },

  // osunlp/MagicBrush; img_id repeats over the turns of a session, so rows are numbered instead.
  magic_brush: {
    source: 'parquet',
    columns: { example_id: null, task: null, instruction: 'instruction', original: 'source_img', edited: 'target_img' },
  },

  // McGill-NLP/AURORA. Guess: a file holds one subset; the published repository may have them in one.
  aurora_ag: aurora,
  aurora_kubric: aurora,
  // Something-Something-v2 in the same form; its licence makes everyone cut the frames themselves.
  ss2: aurora,
  local aurora = {
    source: 'parquet',
    columns: { example_id: null, task: null, instruction: 'instruction', original: 'input', edited: 'output' },
  },

  // mair-lab/vismin. Guess: the columns of its evaluation set; the published training set lists several edits of an
  // image in one row, which has to be unfolded first.
  vismin: {
    source: 'parquet',
    columns: {
      example_id: null,
      task: 'task',
      instruction: 'edit_instruction',
      original: 'source_image',
      edited: 'edited_image',
    },
  },

  // BryanW/HumanEdit.
  'human-edit': {
    source: 'parquet',
    columns: {
      example_id: 'IMAGE_ID',
      task: 'EDITING_TYPE',
      instruction: 'EDITING_INSTRUCTION',
      original: 'INPUT_IMG',
      edited: 'OUTPUT_IMG',
    },
  },
}
