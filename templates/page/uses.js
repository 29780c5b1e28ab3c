// Marks the node that the pointer or the focus is on wherever it stands in its graph, before and after.
for (const sides of document.querySelectorAll(".sides")) {
  const mark = (event, on) => {
    const at = event.target.closest("[data-n]");
    if (!at) return;
    for (const use of sides.querySelectorAll(`[data-n="${CSS.escape(at.dataset.n)}"]`)) use.classList.toggle("used", on);
  };
  for (const [name, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]])
    sides.addEventListener(name, (event) => mark(event, on));
}
