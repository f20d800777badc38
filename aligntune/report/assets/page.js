// What is left: bars, folded rows, and where in the page one is.

function start() {
  document.querySelectorAll("[data-share]").forEach((bar) => { bar.style.width = `${100 * Number(bar.dataset.share)}%`; });
  document.querySelectorAll(".events").forEach((log) => {
    const tick = log.previousElementSibling?.querySelector(".usual");
    tick?.addEventListener("change", () => log.classList.toggle("all", tick.checked));
  });
  const settings = document.getElementById("all-settings");
  settings?.addEventListener("change", () => document.getElementById("settings").classList.toggle("short", !settings.checked));
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-30% 0px -65%" });
  document.querySelectorAll("main > section").forEach((section) => watch.observe(section));
  drawCharts();
  startBrowser();
}

start();
