// Starts the page in `element`. `server` has the functions of app.py.

import { bindAll } from "./controls.js";
import { serverSource } from "./source.js";
import { find, headMaps, isGrowing, state } from "./state.js";
import { bindTour } from "./tour.js";
import { loadNewSnapshots, SESSION, train } from "./train.js";
import { TRAINED, urlOf } from "./url.js";
import { draw, setLocked, showError, showModel } from "./view.js";

export async function start(element, server, source = serverSource(server, showError)) {
  Object.assign(state, { element, source });
  const url = urlOf(location.hash);
  const tab = url.get("tab");
  if (["watch", "curves", "kernel"].includes(tab)) state.tab = tab;
  const key = url.get("model") === TRAINED ? SESSION : url.get("model") ?? "";
  const { hash } = location;
  bindAll();
  for (let shown = false; !shown; ) {
    shown = (await showModel(key, hash)) || (key !== "" && (await showModel("", "")));
    // the server may be restarting
    if (!shown) await new Promise((resolve) => { setTimeout(resolve, 2000); });
  }
  setLocked(state.locked);
  find(".viewer").classList.remove("loading");
  bindTour(tab === "help");
  draw();
  train("status");
  setInterval(() => { if (isGrowing() && state.key !== SESSION) loadNewSnapshots(); }, 5000);
  // the user pasted the URL of a view into the page
  addEventListener("hashchange", () => location.reload());
  window.convit = { headMaps, pixels: () => state.image.pixels, state }; // for tests and benchmarks
}
