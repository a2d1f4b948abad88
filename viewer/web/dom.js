// Helpers for the document.

export const viewer = document.querySelector(".viewer"); // the page's root
export const find = (selector) => viewer.querySelector(selector);
export const findAll = (selector) => [...viewer.querySelectorAll(selector)];
export const on = (selector, type, handler) => find(selector).addEventListener(type, handler);

// Handle clicks on matching elements, also on those added later; it gets their data attributes.
export const onClick = (selector, handler) => viewer.addEventListener("click", (event) => {
  const target = event.target.closest(selector);
  if (target) handler(target.dataset, event);
});

// Markup from a template: lists are joined, and values that are no markup are escaped.
class Markup extends String {}
export function html(strings, ...values) {
  const toMarkup = (value) => (Array.isArray(value) ? value.map(toMarkup).join("")
    : value instanceof Markup ? value
      : String(value).replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`));
  return new Markup(String.raw({ raw: strings }, ...values.map(toMarkup)));
}

// Change the content of an element to markup or text. Nodes that fit are kept, and with them the
// focus, the sliders in use, and what canvases show.
export function render(selector, content) {
  const template = document.createElement("template");
  template.innerHTML = html`${content}`;
  morph(find(selector), template.content);
}

function morph(parent, wanted) {
  const [nodes, others] = [parent, wanted].map(({ childNodes }) => [...childNodes]);
  for (const node of nodes.slice(others.length)) node.remove();
  for (const [index, other] of others.entries()) {
    const node = nodes[index];
    if (!node) parent.append(other);
    else if (node.nodeName !== other.nodeName) node.replaceWith(other);
    else if (!node.isEqualNode(other)) {
      node.nodeValue = other.nodeValue; // of text
      for (const { name } of [...node.attributes ?? []]) {
        if (!other.hasAttribute(name)) node.removeAttribute(name);
      }
      for (const { name, value } of other.attributes ?? []) node.setAttribute(name, value);
      if (node.nodeName === "INPUT") node.value = other.value;
      morph(node, other);
    }
  }
}

// localStorage or sessionStorage, or a substitute where the user has disabled them.
export function storage(name, substitute) {
  try {
    return window[name] ?? substitute;
  } catch {
    return substitute;
  }
}
