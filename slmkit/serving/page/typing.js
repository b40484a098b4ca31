// Typing with an input method: its Enter chooses a word and must not send.

const composing = new WeakSet();

/** Follow the compositions in a text box. */
export function watchComposition(box) {
  box.addEventListener("compositionstart", () => composing.add(box));
  for (const name of ["compositionend", "blur"]) box.addEventListener(name, () => composing.delete(box));
}

/** Whether a key belongs to an input method. Safari ends the composition before its Enter, with key code 229. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229 || composing.has(event.target);
}

/** Let a text box be as high as its text, up to what CSS allows. */
export function grow(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
}
