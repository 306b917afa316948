"use strict";
// Three things that HTML has not: tabs, a tip at the pointer, and a switch between themes.

for (const groups of document.querySelectorAll(".groups")) {
  const panels = [...groups.querySelectorAll("[data-tab]")];
  if (!panels.length) continue;
  const list = document.createElement("div");
  list.className = "tabs";
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", groups.closest("section").querySelector("h2").textContent);
  const tabs = panels.map((panel) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.textContent = panel.dataset.tab;
    tab.id = panel.id + "-tab";
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    list.append(tab);
    return tab;
  });
  const choose = (chosen) => tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", String(i === chosen));
    tab.tabIndex = i === chosen ? 0 : -1;
    panels[i].classList.toggle("away", i !== chosen);
  });
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(i));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1
        : step ? (i + step + tabs.length) % tabs.length : null;
      if (next === null) return;
      event.preventDefault();
      choose(next);
      tabs[next].focus();
    });
  });
  groups.prepend(list);
  choose(0);
}

const tip = document.getElementById("tip");
function show(element) {
  document.querySelectorAll(".at").forEach((other) => other.classList.remove("at"));
  tip.hidden = !element;
  if (!element) return;
  element.classList.add("at");
  tip.textContent = element.dataset.tip;
  const box = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 8);
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (box.top - own.height - 8 > 0 ? box.top - own.height - 8 : box.bottom + 8) + "px";
}
document.addEventListener("pointerover", (event) => show(event.target.closest("[data-tip]")));
addEventListener("scroll", () => show(document.querySelector(".at")), { passive: true, capture: true });
// A chart, a map or a text that has the focus is walked through with the arrow keys.
for (const walked of document.querySelectorAll("svg[tabindex], .heat .scroll, .tokens")) {
  let at = -1;
  walked.addEventListener("blur", () => { at = -1; show(null); });
  walked.addEventListener("keydown", (event) => {
    const points = walked.querySelectorAll("[data-tip]");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!step || !points.length) return;
    event.preventDefault();
    at = Math.min(points.length - 1, Math.max(0, at + step));
    points[at].scrollIntoView({ block: "nearest", inline: "nearest" });
    show(points[at]);
  });
}

const button = document.getElementById("theme"), themes = ["system", "light", "dark"];
let remembered = null;
try { remembered = localStorage.getItem("secateurs-theme"); } catch { /* a page from a disk may not remember */ }
function dress(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  button.textContent = "Theme: " + theme;
  button.dataset.now = theme;
}
button.addEventListener("click", () => {
  const next = themes[(themes.indexOf(button.dataset.now) + 1) % themes.length];
  dress(next);
  try { localStorage.setItem("secateurs-theme", next); } catch { /* as above */ }
});
dress(themes.includes(remembered) ? remembered : "system");
button.hidden = false;
