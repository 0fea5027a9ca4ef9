// A canvas that fills round by round. Each round is shown twice where drafts were made: as drafted, and as verified.
"use strict";

function drafted(pieces) {
  // A rejected draft shares its position with the piece behind it; what was drawn without a draft is still open.
  return pieces.filter((_, i) => i === 0 || pieces[i - 1][1] !== "rejected").map(([text, kind]) =>
    kind === "rejected" || kind === "accepted" ? [text, "drafted"] : kind === "fresh" ? ["_", "open"] : [text, kind]);
}

function stagesOf(frames) {
  const empty = frames[0].pieces.filter(([, kind]) => kind !== "rejected")
    .map(([text, kind]) => kind === "given" ? [text, kind] : ["_", "open"]);
  const stages = [{ pieces: empty, said: "before the first round" }];
  frames.forEach((frame, i) => {
    const count = kind => frame.pieces.filter(piece => piece[1] === kind).length;
    const [accepted, rejected, corrected, fresh] = ["accepted", "rejected", "corrected", "fresh"].map(count);
    const round = `round ${i + 1} of ${frames.length}`;
    if (accepted + rejected) {
      const copied = frame.copied_rounds > (i ? frames[i - 1].copied_rounds : 0);
      const from = copied ? ", copied from the text" : "";
      stages.push({ pieces: drafted(frame.pieces), said: `${round}: ${accepted + rejected} drafted${from}` });
    }
    const parts = accepted + rejected
      ? [`${accepted} accepted`, `${rejected} rejected or dropped`, `${corrected} corrected`, `${fresh} drawn besides`]
      : [`${fresh} drawn`];
    const passes = Object.entries(frame.evaluations).map(([branch, n]) => `${n} ${branch}`).join(", ");
    const open = count("open");
    stages.push({ pieces: frame.pieces, said: `${round}: ${parts.join(", ")}; ${open} open. Passes so far: ${passes}` });
  });
  return stages;
}

function stepper(root) {
  const stages = stagesOf(JSON.parse(root.querySelector("script").textContent));
  const [canvas, counts, slider] = [".canvas", ".counts", "input"].map(name => root.querySelector(name));
  const button = name => root.querySelector(`[data-go=${name}]`);
  let at = stages.length - 1, timer = null;

  function show(to) {
    at = Math.max(0, Math.min(stages.length - 1, to));
    canvas.replaceChildren(...stages[at].pieces.map(([text, kind]) => {
      const span = document.createElement("span");
      span.className = kind;
      span.textContent = text.replaceAll("\n", "↵\n");
      return span;
    }));
    counts.textContent = stages[at].said;
    slider.value = at;
  }
  function pause() {
    clearInterval(timer);
    timer = null;
    button("play").textContent = "Play";
  }
  function play() {
    if (timer !== null) return pause();
    if (at === stages.length - 1) show(0);
    button("play").textContent = "Pause";
    timer = setInterval(() => at === stages.length - 1 ? pause() : show(at + 1), 700);
  }
  function go(to) {
    pause();
    show(to);
  }
  const actions = {
    first: () => go(0), back: () => go(at - 1), play, next: () => go(at + 1), last: () => go(stages.length - 1),
  };
  const keys = { Home: "first", ArrowLeft: "back", " ": "play", ArrowRight: "next", End: "last" };
  for (const name of Object.keys(actions)) button(name).addEventListener("click", actions[name]);
  slider.max = stages.length - 1;
  slider.addEventListener("input", () => go(Number(slider.value)));
  root.addEventListener("keydown", event => {
    // Buttons and the slider have keys of their own.
    if (event.target !== root || !(event.key in keys)) return;
    event.preventDefault();
    actions[keys[event.key]]();
  });
  show(at);
}

document.querySelectorAll(".stepper").forEach(stepper);
