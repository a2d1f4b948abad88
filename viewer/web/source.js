// Where the page gets its models and maps: Python functions, which Gradio offers as `server`.
// A site without a server replaces this object; every method returns null after an error, which
// it has reported with `report`.

const OFFLINE = { error: "The server is not responding; please try again." };

export function serverSource(server, report) {
  async function call(name, request, showError = true) {
    const answer = (await server[name](request).catch(() => null)) ?? OFFLINE;
    if (showError) report(answer.error ?? "");
    return answer.error ? null : answer;
  }

  return {
    // the model of a key: "" for the first one, or the session that has trained it
    describe: (model, showError) => call("describe", { model }, showError),
    // { example: name } or { file: base64 }: display and input as data URLs, and pixels
    prepareImage: (model, image) => call("prepare_image", { model, ...image }),
    // content maps and predictions of an image in one layer, for all snapshots
    layerMaps: (model, { pixels }, layer) => call("layer_maps", { model, pixels, layer }),
    // the same for one snapshot with changed gates (null: trained)
    recompute: (model, { pixels }, layer, snapshot, gates) =>
      call("recompute", { model, pixels, layer, snapshot, gates }),
    // a PNG or GIF of a view: { layer, head, snapshot, query, gates, animated }
    exportFigure: (model, { pixels, display }, view) =>
      call("export", { model, pixels, display, ...view }),
    // start, stop, or status of the training run of a session
    train: (session, action) => call("train", { model: session, action }, action !== "status"),
  };
}
