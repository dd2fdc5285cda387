// VIEScore's perceptual quality, in words of our own. The judge sees the edited picture alone: shown the original too,
// it would score the difference again.
{
  name: 'perceptual quality',
  images: ['edited'],
  scores: ['naturalness', 'artifacts'],
  lowest: 0,
  highest: 10,
  prompt: |||
    You check the quality of a picture that a program has made.

    {edited}

    Give two whole numbers. What the picture shows, and whether it is interesting, does not matter.

    naturalness, from 0 to 10: does the picture hold together as one scene? 0 means that light, shadows, distances or
    proportions contradict each other everywhere, 5 that it looks unnatural here and there, 10 that nothing in it looks
    out of place.

    artifacts, from 0 to 10, where more is better: is it free of flaws? 0 means that most of it is covered by distortion,
    blur, seams, noise or objects that cannot be recognised, 5 that there are flaws that one notices, 10 that there are
    none.

    Say in one or two short sentences what you see, then give the numbers, as JSON:
    {"reasoning": "...", "naturalness": number, "artifacts": number}
  |||,
}
