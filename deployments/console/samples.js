// Samples as lines of text: a prompt, or `{"input", "output"}`.

/** Reads the lines. Returns `rows`, or the `problem` in words. `where`: what has the lines. */
export function readSamples(text, where) {
  const rows = [];
  for (const [place, line] of text.split("\n").entries()) {
    if (!line.trim()) continue;
    let row = { input: line.trim() };
    if (line.trim().startsWith("{")) {
      try { row = JSON.parse(line); } catch { return { problem: `line ${place + 1} of ${where} is not JSON` }; }
      if (typeof row.input !== "string" || !["string", "undefined"].includes(typeof row.output)) return { problem: `line ${place + 1} of ${where} needs "input", and "output" must be text` };
    }
    rows.push(row);
  }
  return { rows };
}

/** Returns the lines that `readSamples` reads as these samples. */
export function writeSamples(samples) {
  return samples.map(({ input, output }) => {
    const isPlain = output === null && input === input.trim() && !/^\{|[\n\r]/.test(input);
    return isPlain ? input : JSON.stringify(output === null ? { input } : { input, output });
  }).join("\n");
}
