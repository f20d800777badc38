// Two texts word by word: the longest common subsequence.

const MOST_WORDS = 2000; // of either text; longer ones are compared by lines

const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];
const lines = (text) => text.match(/[^\n]*\n|[^\n]+/g) || [];

// [[kind, text]] with kind "same", "del" (only in a) or "ins" (only in b).
function differ(textA, textB) {
  let a = words(textA), b = words(textB);
  if (a.length > MOST_WORDS || b.length > MOST_WORDS) {
    a = lines(textA).slice(0, MOST_WORDS);
    b = lines(textB).slice(0, MOST_WORDS);
  }
  let begin = 0, endA = a.length, endB = b.length;
  while (begin < endA && begin < endB && a[begin] === b[begin]) begin++;
  while (endA > begin && endB > begin && a[endA - 1] === b[endB - 1]) { endA--; endB--; }
  const height = endA - begin, width = endB - begin;
  const longest = new Uint16Array((height + 1) * (width + 1));
  const at = (i, j) => i * (width + 1) + j;
  for (let i = height - 1; i >= 0; i--) {
    for (let j = width - 1; j >= 0; j--) {
      longest[at(i, j)] = a[begin + i] === b[begin + j]
        ? longest[at(i + 1, j + 1)] + 1
        : Math.max(longest[at(i + 1, j)], longest[at(i, j + 1)]);
    }
  }
  const out = [];
  const add = (kind, text) => {
    if (out.length && out[out.length - 1][0] === kind) out[out.length - 1][1] += text;
    else if (text) out.push([kind, text]);
  };
  add("same", a.slice(0, begin).join(""));
  let i = 0, j = 0;
  while (i < height || j < width) {
    if (i < height && j < width && a[begin + i] === b[begin + j]) { add("same", a[begin + i]); i++; j++; }
    else if (i < height && (j === width || longest[at(i + 1, j)] >= longest[at(i, j + 1)])) { add("del", a[begin + i]); i++; }
    else { add("ins", b[begin + j]); j++; }
  }
  add("same", a.slice(endA).join(""));
  return out;
}
