// A real OpenID provider on loopback: security.md 1.8. It forgets everything when it ends.
//
// node provider.mjs '{"keys": "old"}'   then commands on standard input, one JSON object a line:
//   {"keys": "old+new"}    restart the provider with these signing keys, at the same address
//   {"advance_s": 600}     let its clock go forward
// Each is answered with one line on standard output, {"url": ...}, once it is in force. It ends with its standard input.

import { createServer } from 'node:http';
import { createInterface } from 'node:readline';
import { exportJWK, generateKeyPair } from 'jose';
import Provider from 'oidc-provider';

// Standard output is for answers; what the library has to say belongs into the log.
console.log = console.error;
console.info = console.error;

const ALGORITHMS = ['RS256', 'ES256', 'EdDSA'];
const API_SCOPES = 'infer:generate infer:admin';

const generations = new Map();

async function keysOf(generation) {
  if (!generations.has(generation)) {
    generations.set(generation, await Promise.all(ALGORITHMS.map(async (alg) => {
      const { privateKey } = await generateKeyPair(alg, { extractable: true });
      return { ...await exportJWK(privateKey), kid: `${generation}-${alg}`, alg, use: 'sig' };
    })));
  }
  return generations.get(generation);
}

async function provider(issuer, keys) {
  const noRedirects = { redirect_uris: [], response_types: [] };
  // The first key of a kind signs: with "old+new" that is the new one, while tokens of the old one can still be checked.
  const jwks = (await Promise.all(keys.split('+').reverse().map(keysOf))).flat();
  return new Provider(issuer, {
    clients: [
      {
        ...noRedirects, client_id: 'svc', client_secret: 'svc-secret', grant_types: ['client_credentials'],
      },
      {
        ...noRedirects, client_id: 'rs', client_secret: 'rs-secret', grant_types: [],
        token_endpoint_auth_method: 'client_secret_basic',
      },
      {
        ...noRedirects, client_id: 'inferctl', token_endpoint_auth_method: 'none', application_type: 'native',
        grant_types: ['urn:ietf:params:oauth:grant-type:device_code', 'refresh_token'],
      },
    ],
    jwks: { keys: jwks },
    clockTolerance: 5, // it forgets a device code this long after its end, and until then says that it has expired
    scopes: ['openid', 'offline_access'],
    cookies: { keys: ['of-a-test'] },
    features: {
      devInteractions: { enabled: true },
      deviceFlow: { enabled: true },
      clientCredentials: { enabled: true },
      introspection: { enabled: true, allowedPolicy: () => true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => undefined,
        useGrantedResource: () => true,
        getResourceServerInfo: (ctx, resource) => ({
          scope: API_SCOPES,
          audience: resource,
          accessTokenTTL: 600,
          ...(resource.endsWith('/opaque')
            ? { accessTokenFormat: 'opaque' }
            : { accessTokenFormat: 'jwt', jwt: { sign: { alg: 'RS256' } } }),
        }),
      },
    },
    extraTokenClaims: () => ({ roles: ['user'], tenant: 't1' }),
  });
}

const systemTime = Date.now;
let ahead = 0;
Date.now = () => systemTime() + ahead;

let handle;
const server = createServer((request, response) => handle(request, response));
await new Promise((resolve) => { server.listen(0, '127.0.0.1', resolve); });
const url = `http://127.0.0.1:${server.address().port}`;

async function obey({ keys, advance_s: advance }) {
  if (keys !== undefined) handle = (await provider(url, keys)).callback();
  if (advance !== undefined) ahead += advance * 1000;
  process.stdout.write(`${JSON.stringify({ url })}\n`);
}

await obey(JSON.parse(process.argv[2]));
for await (const line of createInterface({ input: process.stdin })) await obey(JSON.parse(line));
process.exit(0);
