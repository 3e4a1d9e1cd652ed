// The element <steermoe-trace>: tokens that can be walked over, and for one of them a grid of layers x experts.
// Its tokens are in the HTML already; the choices are in a JSON block inside it. Loads nothing.
"use strict";
(() => {
  if (customElements.get("steermoe-trace")) return;
  const NONE = -1;

  function bytes(text) {
    const raw = atob(text), found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }

  // Choices are stored plus one, so that 0 is "none"; two bytes each, low first, where a layer has over 254 experts.
  function choices(text, wide) {
    const packed = bytes(text), found = new Int32Array(packed.length / (wide ? 2 : 1));
    for (let i = 0; i < found.length; i++) {
      found[i] = (wide ? packed[2 * i] + 256 * packed[2 * i + 1] : packed[i]) - 1;
    }
    return found;
  }

  function made(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  const percent = (share) => `${Math.round(100 * share)}%`;
  const shown = (text) => (text.trim() ? text.trim() : text.replace(/\n/g, "\u21b5").replace(/ /g, "\u2423") || "\u00b7");

  class TraceView extends HTMLElement {
    connectedCallback() {
      if (this.isReady) return;
      if (document.readyState === "loading") {
        document.addEventListener("DOMContentLoaded", () => this.connectedCallback(), { once: true });
        return;
      }
      const block = this.querySelector("script[type='application/json']");
      if (!block) return;
      this.isReady = true;
      const data = JSON.parse(block.textContent);
      this.data = data;
      this.now = choices(data.chosen, data.wide);
      this.before = data.unsteered === null ? this.now : choices(data.unsteered, data.wide);
      this.width = Math.max(...data.experts);
      this.areas = data.domains.map((domain) => bytes(domain.experts));
      this.tokens = [...this.querySelectorAll(".smt-token")];
      this.pinned = null;
      this.at = 0;
      this.build();
      this.listen();
      const first = this.tokens.findIndex((_, token) => this.isRead(token) && data.strength[token] !== 0);
      this.select(Math.max(0, first));
      new ResizeObserver(() => this.draw()).observe(this.panel);
      const scheme = matchMedia("(prefers-color-scheme: dark)");
      scheme.addEventListener("change", () => this.draw());
    }

    build() {
      this.querySelector(".smt-modes").addEventListener("click", (event) => {
        const button = event.target.closest("button");
        if (!button) return;
        this.dataset.colour = button.value;
        for (const one of this.querySelectorAll(".smt-modes button")) one.setAttribute("aria-pressed", String(one === button));
        for (const key of this.querySelectorAll(".smt-key[data-for]")) key.hidden = key.dataset.for !== button.value;
        this.draw();
      });
      this.panel = this.querySelector(".smt-panel");
      this.panel.replaceChildren();
      this.head = this.panel.appendChild(made("div", "smt-head"));
      this.shares = this.panel.appendChild(made("div", "smt-shares"));
      this.panel.appendChild(made("h3", "", "This token: layers (down) and experts (across)"));
      this.grid = this.panel.appendChild(made("canvas"));
      this.say = this.panel.appendChild(made("p", "smt-say"));
      this.say.setAttribute("aria-live", "polite");
      this.panel.appendChild(this.legend());
      this.panel.appendChild(made("h3", "", "The whole text: layers (down) and tokens (across)"));
      this.strip = this.panel.appendChild(made("canvas"));
      this.panel.appendChild(made("p", "smt-hint", "Point at a token, or walk with the arrow keys; click or Enter holds it, Esc lets go."));
      for (const canvas of [this.grid, this.strip]) canvas.setAttribute("role", "img");
      this.querySelector(".smt-modes").hidden = false;
    }

    legend() {
      const list = made("ul", "smt-legend");
      const entry = (name, text, colour) => {
        const item = list.appendChild(made("li", colour || ""));
        item.append(made("i", name), document.createTextNode(text));
      };
      entry("smt-i-both", "chosen, with steering or without");
      if (this.before !== this.now) {
        entry("smt-i-now", "chosen because of steering", "smt-c0");
        entry("smt-i-before", "left out because of steering");
      }
      this.data.domains.forEach((domain, number) => entry("smt-i-area", `expert of ${domain.name}`, `smt-c${number % 8}`));
      return list;
    }

    listen() {
      const text = this.querySelector(".smt-text");
      const number = (event) => {
        const token = event.target.closest(".smt-token");
        return token ? this.tokens.indexOf(token) : NONE;
      };
      text.addEventListener("pointerover", (event) => {
        if (event.pointerType === "mouse" && this.pinned === null && number(event) >= 0) this.select(number(event));
      });
      text.addEventListener("click", (event) => {
        if (number(event) >= 0) this.pin(number(event));
      });
      text.addEventListener("focusin", (event) => {
        if (number(event) >= 0) this.select(number(event));
      });
      text.addEventListener("keydown", (event) => this.walk(event));
      this.grid.addEventListener("pointermove", (event) => this.explain(event));
      this.grid.addEventListener("click", (event) => this.explain(event));
      this.grid.addEventListener("pointerleave", () => this.summarise());
      this.strip.addEventListener("click", (event) => {
        const at = Math.floor((event.offsetX / this.strip.clientWidth) * this.tokens.length);
        this.pin(Math.min(this.tokens.length - 1, Math.max(0, at)));
      });
    }

    walk(event) {
      const last = this.tokens.length - 1;
      const to = {
        ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last,
        ArrowDown: this.line(1), ArrowUp: this.line(-1),
      }[event.key];
      if (event.key === "Enter" || event.key === " ") this.pin(this.at);
      else if (event.key === "Escape") this.release();
      else if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      else {
        this.select(Math.min(last, Math.max(0, to)));
        if (this.pinned !== null) this.pinned = this.at;
        this.tokens[this.at].focus({ preventScroll: false });
      }
      event.preventDefault();
    }

    // The token below or above the present one.
    line(way) {
      const here = this.tokens[this.at].getBoundingClientRect();
      const middle = here.left + here.width / 2;
      let best = this.at, distance = Infinity, row = null;
      for (let i = this.at + way; i >= 0 && i < this.tokens.length; i += way) {
        const box = this.tokens[i].getClientRects()[0] || this.tokens[i].getBoundingClientRect();
        const gap = way * (box.top - here.top);
        if (gap < here.height / 3) continue;
        if (row === null) row = box.top;
        if (Math.abs(box.top - row) > here.height / 3) break;
        const away = Math.abs(box.left + box.width / 2 - middle);
        if (away < distance) [best, distance] = [i, away];
      }
      return best;
    }

    pin(number) {
      if (this.pinned === number) return this.release();
      this.select(number);
      this.pinned = number;
      this.tokens[number].focus({ preventScroll: true });
      this.dispatchEvent(new CustomEvent("steermoe-token", { bubbles: true, detail: { number } }));
    }

    release() {
      this.pinned = null;
    }

    select(number) {
      if (!this.tokens.length) return;
      this.tokens[this.at].classList.remove("smt-on");
      this.tokens[this.at].tabIndex = -1;
      this.at = number;
      this.tokens[number].classList.add("smt-on");
      this.tokens[number].tabIndex = 0;
      this.tell();
      this.draw();
      this.summarise();
    }

    isRead(token) {
      const { layers, top_k } = this.data, size = layers.length * top_k;
      for (let i = token * size; i < (token + 1) * size; i++) if (this.now[i] >= 0) return true;
      return false;
    }

    // The experts of a token in a layer.
    of(array, token, layer) {
      const { layers, top_k } = this.data, start = (token * layers.length + layer) * top_k;
      return array.subarray(start, start + top_k);
    }

    isIn(domain, layer, expert) {
      const bit = layer * this.width + expert;
      return ((this.areas[domain][bit >> 3] >> (7 - (bit & 7))) & 1) === 1;
    }

    share(array, token, domain, only) {
      let hits = 0, places = 0;
      const layers = only === undefined ? this.data.layers.map((_, layer) => layer) : [only];
      for (const layer of layers) {
        for (const expert of this.of(array, token, layer)) {
          if (expert < 0) continue;
          places++;
          hits += this.isIn(domain, layer, expert) ? 1 : 0;
        }
      }
      return places ? hits / places : 0;
    }

    movedIn(token, layer) {
      const now = this.of(this.now, token, layer), before = this.of(this.before, token, layer);
      let moved = 0, places = 0;
      for (const expert of now) {
        if (expert < 0) continue;
        places++;
        moved += before.includes(expert) ? 0 : 1;
      }
      return places ? moved / places : 0;
    }

    tell() {
      const { data, at } = this;
      const facts = [`token ${at + 1} of ${this.tokens.length}`, `probability ${percent(Math.exp(data.logprob[at]))}`];
      if (data.strength[at]) facts.push(`strength ${Number(data.strength[at].toPrecision(4))}`);
      else facts.push("not steered");
      this.head.replaceChildren(made("span", "smt-word", shown(data.tokens[at])));
      for (const fact of facts) this.head.append(made("span", "smt-fact", fact));
      this.shares.replaceChildren();
      if (!this.isRead(at)) return;
      data.domains.forEach((domain, number) => {
        const now = this.share(this.now, at, number), before = this.share(this.before, at, number);
        const track = made("div", `smt-track smt-c${number % 8}`), fill = made("div", "smt-fill"), mark = made("div", "smt-mark");
        fill.style.width = percent(now);
        mark.style.left = `calc(${percent(before)} - 1px)`;
        track.append(fill, mark);
        const words = this.before === this.now ? percent(now) : `${percent(before)} \u2192 ${percent(now)}`;
        this.shares.append(made("span", "", domain.name), track, made("span", "", words));
      });
    }

    colours() {
      const style = getComputedStyle(this), value = (name) => style.getPropertyValue(name).trim();
      const domains = this.data.domains.map((_, number) => value(`--d${number % 8}`));
      return {
        domains, text: value("--text"), quiet: value("--quiet"), both: value("--both"), line: value("--line"), back: value("--back"),
        moved: value("--moved"), surprise: value("--surprise"), focus: value("--focus"),
      };
    }

    fit(canvas, height) {
      const width = canvas.clientWidth || this.panel.clientWidth - 30, scale = window.devicePixelRatio || 1;
      canvas.style.height = `${height}px`;
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      const pen = canvas.getContext("2d");
      pen.setTransform(scale, 0, 0, scale, 0, 0);
      return [pen, width];
    }

    draw() {
      if (!this.isReady || !this.tokens.length || !this.panel.clientWidth) return;
      this.drawGrid();
      this.drawStrip();
    }

    drawGrid() {
      const { data, at } = this, rows = data.layers.length, colours = this.colours();
      const left = 26, bottom = 16;
      const across = (this.grid.clientWidth || this.panel.clientWidth - 30) - left;
      const wide = Math.min(30, across / this.width), high = Math.max(4, Math.min(11, wide));
      const [pen] = this.fit(this.grid, rows * high + bottom);
      this.cell = { left, wide, high };
      const gap = wide >= 6 ? 1 : wide >= 3 ? 0.5 : 0;
      pen.font = "10px system-ui, sans-serif";
      pen.textBaseline = "middle";
      for (let layer = 0; layer < rows; layer++) {
        const top = layer * high, now = this.of(this.now, at, layer), before = this.of(this.before, at, layer);
        pen.fillStyle = colours.quiet;
        if (layer % Math.ceil(12 / high) === 0) pen.fillText(String(data.layers[layer]), 0, top + high / 2);
        for (let expert = 0; expert < data.experts[layer]; expert++) {
          const x = left + expert * wide, domain = data.domains.findIndex((_, number) => this.isIn(number, layer, expert));
          pen.globalAlpha = domain < 0 ? 0.35 : 0.24;
          pen.fillStyle = domain < 0 ? colours.line : colours.domains[domain];
          pen.fillRect(x, top, wide - gap, high - Math.min(gap, 1));
          pen.globalAlpha = 1;
          const isNow = now.includes(expert), wasBefore = before.includes(expert);
          if (isNow) {
            pen.fillStyle = wasBefore ? colours.both : domain < 0 ? colours.text : colours.domains[domain];
            pen.fillRect(x, top, wide - gap, high - Math.min(gap, 1));
          } else if (wasBefore) {
            const pad = wide >= 5 ? 1.5 : 0.5;
            pen.lineWidth = wide >= 5 ? 1.5 : 1;
            pen.strokeStyle = colours.text;
            pen.strokeRect(x + pad / 2, top + pad / 2, Math.max(0.5, wide - gap - pad), high - gap - pad);
          }
        }
      }
      pen.fillStyle = colours.quiet;
      pen.fillText("0", left, rows * high + bottom / 2 + 2);
      const last = String(this.width - 1);
      pen.fillText(last, left + this.width * wide - pen.measureText(last).width, rows * high + bottom / 2 + 2);
      pen.fillText("expert", left + (this.width * wide) / 2 - 14, rows * high + bottom / 2 + 2);
      this.grid.setAttribute("aria-label", `experts of token ${at + 1} in ${rows} layers`);
    }

    drawStrip() {
      const { data } = this, rows = data.layers.length, count = this.tokens.length, colours = this.colours();
      const high = Math.max(2, Math.min(5, 130 / rows));
      const [pen, width] = this.fit(this.strip, rows * high);
      const wide = width / count, byMoved = this.dataset.colour === "moved" || !data.domains.length;
      for (let token = 0; token < count; token++) {
        for (let layer = 0; layer < rows; layer++) {
          let colour = colours.moved, level = 0;
          if (byMoved) level = this.movedIn(token, layer);
          else {
            data.domains.forEach((_, number) => {
              const share = this.share(this.now, token, number, layer);
              if (share > level) [level, colour] = [share, colours.domains[number]];
            });
          }
          pen.globalAlpha = 0.06 + 0.86 * level;
          pen.fillStyle = level ? colour : colours.both;
          pen.fillRect(token * wide, layer * high, Math.max(0.6, wide - (wide > 4 ? 0.7 : 0)), high - (high > 3 ? 0.5 : 0));
        }
      }
      pen.globalAlpha = 1;
      pen.strokeStyle = colours.focus;
      pen.lineWidth = 2;
      pen.strokeRect(this.at * wide + 0.5, 1, Math.max(2, wide - 1), rows * high - 2);
      const what = byMoved ? "filled by steering" : "of the domains";
      this.strip.setAttribute("aria-label", `places ${what}, in ${rows} layers of ${count} tokens`);
    }

    explain(event) {
      const { left, wide, high } = this.cell, { data, at } = this;
      const layer = Math.floor(event.offsetY / high), expert = Math.floor((event.offsetX - left) / wide);
      if (layer < 0 || layer >= data.layers.length || expert < 0 || expert >= data.experts[layer]) return this.summarise();
      const isNow = this.of(this.now, at, layer).includes(expert), wasBefore = this.of(this.before, at, layer).includes(expert);
      const what = isNow
        ? wasBefore ? "chosen, with steering or without" : "chosen because of steering"
        : wasBefore ? "left out because of steering" : "not chosen";
      const names = data.domains.filter((_, number) => this.isIn(number, layer, expert)).map((domain) => domain.name);
      const whose = names.length ? `; an expert of ${names.join(", ")}` : "";
      this.say.textContent = `layer ${data.layers[layer]}, expert ${expert}: ${what}${whose}`;
    }

    summarise() {
      const { data, at } = this;
      if (!this.isRead(at)) {
        this.say.textContent = "The text ends here: the model did not read this token, so it went to no expert.";
        return;
      }
      let moved = 0, places = 0, touched = 0;
      data.layers.forEach((_, layer) => {
        const here = this.of(this.now, at, layer).filter((expert) => expert >= 0).length, share = this.movedIn(at, layer);
        places += here;
        moved += share * here;
        touched += share > 0 ? 1 : 0;
      });
      this.say.textContent = this.before === this.now
        ? `${places} places in ${data.layers.length} layers, as the routers chose them`
        : `steering filled ${Math.round(moved)} of ${places} places with other experts, in ${touched} of ${data.layers.length} layers`;
    }
  }

  customElements.define("steermoe-trace", TraceView);
})();
