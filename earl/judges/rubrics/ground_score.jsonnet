// How near an edit comes to the ground-truth edit in meaning, in words of our own.
{
  name: 'ground score',
  images: ['target', 'edited'],
  scores: ['ground_score'],
  lowest: 0,
  highest: 10,
  prompt: |||
    You compare an edited picture with the result that was wanted.

    The instruction was: {instruction}

    The result that was wanted:
    {target}
    The edited picture:
    {edited}

    Give one whole number, ground_score, from 0 to 10: do the two pictures show the same? Look at which objects there are,
    how many, where, of what kind and colour, and what they do. Sharpness and small differences of shade do not count.
    0 means that they show different things, 5 that part of what was wanted is there, 10 that they mean the same.

    Say in one or two short sentences where they agree and differ, then give the number, as JSON:
    {"reasoning": "...", "ground_score": number}
  |||,
}
