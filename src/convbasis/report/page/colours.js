// Colours are the style sheet's; a probe resolves them for the theme in force.
const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);

function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

function ramp(letter) {
  return [0, 1, 2, 3, 4].map((step) => [step / 4, colour(letter + step)]);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Calls redraw whenever the colours change: by the button, by the system, for print and after it.
function watchTheme(redraw) {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const name = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
  button.hidden = false;
  name();
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { name(); redraw(); });
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    redraw();
  });
  addEventListener("afterprint", () => {
    if (before === undefined) delete root.dataset.theme;
    else root.dataset.theme = before;
    redraw();
  });
}
