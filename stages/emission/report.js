(() => {
  "use strict";
  const box = document.getElementById("search");
  if (!box) return;
  const words = box.querySelector("input");
  const fate = box.querySelector("select");
  const said = box.querySelector("output");
  const rows = [...document.querySelectorAll("#examples details")].map((row) => ({
    row,
    fate: row.dataset.fate,
    text: row.textContent.toLowerCase(),
  }));
  const show = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { row, fate: became, text } of rows) {
      const hit = (!fate.value || became === fate.value) && wanted.every((word) => text.includes(word));
      row.hidden = !hit;
      count += hit;
    }
    said.textContent = `${count} of ${rows.length} shown`;
  };
  words.addEventListener("input", show);
  fate.addEventListener("change", show);
  document.documentElement.classList.add("live");
  show();
})();
