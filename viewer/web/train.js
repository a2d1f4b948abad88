// Train it here: the server trains for one visitor at a time; this asks how it stands, and follows.

let looking = null;
async function train(wish) {
  clearTimeout(looking);
  const standing = await ask("train", { visitor: VISITOR, wish }, wish !== "look");
  if (!standing) return void (looking = setTimeout(() => train("look"), 5000));
  const { state: how, place, epoch, epochs, seconds } = standing;
  const busy = how === "waiting" || how === "training";
  find(".train").hidden = busy;
  find(".train-stop").hidden = !busy;
  find(".train-progress").hidden = how !== "training";
  find(".train-progress").value = how === "training" ? (epoch + 1) / (epochs + 1) : 0;
  find(".train-words").textContent = {
    idle: "A nano model, from nothing, on this server: two to three minutes on two cores. Its pictures have one plain square and three with a pattern; it must name the pattern of the one that has the plain square's colour.",
    full: "Too many are waiting already; please come back later.",
    waiting: `Someone else's model is being trained; ${place === 1 ? "yours is next" : `${place} are before you`}.`,
    training: epoch < 0 ? "Starting…" : `Epoch ${epoch} of ${epochs} is done${seconds === null ? "" : `, about ${seconds} s to go`}.${state.run === VISITOR ? " Its gates are on show as they change." : ""}`,
    done: `${epoch < epochs ? "Stopped" : "Done"}. ${state.run === VISITOR ? "The slider above goes through its training." : "Choose “trained here” above to look at it."}`,
    failed: "The training ended before its first epoch; please try again.",
  }[how];
  if (epoch >= 0 && find(".runs").options.length < 2) {
    find(".runs").add(new Option("trained here", VISITOR));
    find(".of-run").classList.remove("absent-always");
  }
  if (busy && epoch >= 0 && (state.run !== VISITOR ? shownEpoch < 0 : epoch > shownEpoch)) {
    const before = shownEpoch;
    shownEpoch = epoch;
    if (state.run !== VISITOR) await showRun(VISITOR);
    else if (!(await follow())) shownEpoch = before; // in a second again
  }
  if (how === "done" && state.run === VISITOR && epoch > shownEpoch && (await follow())) shownEpoch = epoch;
  clearTimeout(looking);
  if (busy) looking = setTimeout(() => train("look"), 1000);
}
let shownEpoch = -1; // of the run trained here; after the first one the visitor is free to look at another model

async function trainAnew() {
  if (state.run === VISITOR) await showRun(""); // the earlier model makes room
  if (find(".runs").options.length > 1) find(".runs").remove(1);
  find(".of-run").classList.add("absent-always");
  shownEpoch = -1;
  train("start");
}

// New snapshots and measurements of a run that goes on; who stands at its end goes along. False: nothing has come of it.
async function follow() {
  const of = state.run;
  const answer = await ask("describe", {}, false);
  if (!answer || of !== state.run) return false;
  if (answer.epochs.length > run.epochs.length) {
    await go({});
    if (of !== state.run || !maps || maps.content.length < answer.epochs.length) return false;
  } else if (answer.story?.epochs.length === run.story?.epochs.length) return true;
  const atEnd = state.checkpoint === run.epochs.length - 1;
  takeRun(answer);
  find(".checkpoint").max = run.epochs.length - 1;
  if (atEnd) state.checkpoint = run.epochs.length - 1;
  paint();
  return true;
}
