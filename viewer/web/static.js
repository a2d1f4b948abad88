// Models and maps for a site without a server: files that `python -m viewer.publish` has written,
// gzipped JSON under a name that hosts do not decompress.

// `base` is the URL of the files, `first` the key of the model that opens.
export function staticSource(base, first, report) {
  async function load(model, name) {
    report("");
    try {
      const path = `${encodeURIComponent(model || first)}/${encodeURIComponent(name)}.bin`;
      const { ok, body } = await fetch(new URL(path, base));
      if (ok) return await new Response(body.pipeThrough(new DecompressionStream("gzip"))).json();
    } catch { /* reported below */ }
    report("A file of this page could not be loaded; please try again.");
    return null;
  }

  async function refuse() {
    report("This needs the model itself: run “python app.py” in a clone of the repository.");
    return null;
  }

  return {
    describe: (model) => load(model, "model"),
    prepareImage: (model, { example }) => (example ? load(model, example) : refuse()),
    layerMaps: (model, { name }, layer) => load(model, `${name}-${layer}`),
    // only for the last snapshot, with all gates at 0 or all at 1
    recompute: (model, { name, last }, layer, snapshot, gates) => {
      const pin = [0, 1].find((value) => gates.every((heads) =>
        heads === null || heads.every((gate) => gate === value)));
      const isStored = snapshot === last && pin !== undefined;
      return isStored ? load(model, `${name}-${layer}-${pin}`) : refuse();
    },
    exportFigure: refuse,
    train: (session, action) => (action === "status" ? { state: "static" } : refuse()),
  };
}
