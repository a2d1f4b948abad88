// Starts the page in `element`. `server` has the functions of app.py.

import { bindAll } from "./controls.js";
import { serverSource } from "./source.js";
import { find, headMaps, isGrowing, isOwn, SESSION, state } from "./state.js";
import { bindTour } from "./tour.js";
import { loadNewSnapshots, train } from "./train.js";
import { TRAINED, urlOf } from "./url.js";
import { draw, setLocked, showError, showModel } from "./view.js";

export async function start(element, server, source = serverSource(server, showError)) {
  Object.assign(state, { element, source });
  const { hash } = location;
  const url = urlOf(hash);
  const [tab, model] = [url.get("tab"), url.get("model") ?? ""];
  if (["watch", "curves", "kernel"].includes(tab)) state.tab = tab;
  const key = model === TRAINED ? SESSION : model;
  bindAll();
  while (!(await showModel(key, hash)) && !(key !== "" && (await showModel("", "")))) {
    await new Promise((resolve) => { setTimeout(resolve, 2000); }); // the server may be restarting
  }
  setLocked(state.locked);
  find(".viewer").classList.remove("loading");
  bindTour(tab === "help");
  draw();
  train("status");
  setInterval(() => { if (isGrowing() && !isOwn()) loadNewSnapshots(); }, 5000);
  // the user pasted the URL of a view into the page
  addEventListener("hashchange", () => location.reload());
  window.convit = { headMaps, pixels: () => state.image.pixels, state }; // for tests and benchmarks
}
